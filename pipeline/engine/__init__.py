"""Training, sampling and scoring: what a stage calls once it has built its parts."""
