"""Methods: everything that makes a model cheaper, as operating points on one frontier. One file is one method."""
