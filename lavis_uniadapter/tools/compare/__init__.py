"""Methods side by side: ``python -m lavis_uniadapter.compare --help`` tells how."""
