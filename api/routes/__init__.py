"""One router per resource; each is a thin translation between HTTP and the service."""
