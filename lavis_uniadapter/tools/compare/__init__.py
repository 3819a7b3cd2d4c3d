"""Methods side by side: ``uniadapter compare``."""
