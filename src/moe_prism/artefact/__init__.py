"""What stands on disk: opening, loading and checking the folders that commands read and write."""
