"""The Headgate driver pms5003."""
