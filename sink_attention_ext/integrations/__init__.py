"""Adapters to other libraries. Nothing here is imported by sink_attention_ext itself."""
