"""Many files: folders and lists of millions of them, and places that are no folders of this machine."""
