"""Servers that speak OpenAI's chat API: one client, rate limits, and a cache of answers."""
