"""Vision-language models that judge pictures over the OpenAI chat protocol: the client, its dialects, and rewards made of them."""
