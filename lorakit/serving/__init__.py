"""An endpoint that speaks OpenAI's protocol, over one model and its adapters."""
