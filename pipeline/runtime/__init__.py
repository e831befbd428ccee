"""What touches processes, files, other machines and the tracker."""
