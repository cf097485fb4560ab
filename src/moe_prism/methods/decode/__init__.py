"""Methods of decoding: how the next token follows from one or several forwards. One file is one method."""
