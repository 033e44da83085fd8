"""The routes of the service, one file per kind of thing."""
