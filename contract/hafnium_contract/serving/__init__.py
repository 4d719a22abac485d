"""What predictor and transformer have in common beside the contract. Needs what their extras bring: uvicorn, prometheus-client."""
