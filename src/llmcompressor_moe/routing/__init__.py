"""What routers decided, compared."""
