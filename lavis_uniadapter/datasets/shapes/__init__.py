"""The embedded example: captioned stills and clips of coloured shapes, drawn from a seed."""
