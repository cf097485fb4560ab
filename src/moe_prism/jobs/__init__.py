"""The work behind the commands, one file each. Functions return objects; nothing here prints."""
