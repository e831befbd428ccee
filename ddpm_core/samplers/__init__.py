"""One file a method, one signature for all."""
