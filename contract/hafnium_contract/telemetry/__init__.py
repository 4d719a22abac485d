"""OpenTelemetry. Needs the extra `telemetry`; `hafnium_contract.serving.tracing` is the door to it, and says so when it is missing."""
