"""Remove neurons of experts: which, in memory and in files."""
