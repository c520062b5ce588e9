"""Programs that measure what is promised."""
