"""The only code that knows the insides of LAVIS's ``vit.py`` and ``med.py``."""
