"""The files people have, in and out; nothing in here is about RLHF.

    formats        the data sets people bring, as rows
    tokenizer      tokenizer.json and chat templates
    checkpoint     Hugging Face folders: config and weights, and what a resumed run needs
    safetensors    the tensors in them
    hub            folders fetched from the hub, kept in a cache
"""
