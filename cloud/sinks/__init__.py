"""Where readings end up."""
