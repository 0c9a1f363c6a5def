"""How long whole pipelines take, dense and with RAS."""
