"""`sana serve`: the OpenAI Images API over one `Session`, and a page."""
