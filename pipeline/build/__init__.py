"""The only place where a name in params.yaml or model.json becomes an object."""
