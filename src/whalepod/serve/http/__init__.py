"""The HTTP server: an OpenAI-compatible API before an engine (`request.Service`)."""
