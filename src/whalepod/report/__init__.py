"""Tables and figures from plans and runs."""
