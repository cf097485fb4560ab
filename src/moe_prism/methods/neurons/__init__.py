"""Methods that remove neurons of experts: one file ranks them, `base` does the rest."""
