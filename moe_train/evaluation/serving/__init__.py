"""``moe-serve``: requests over HTTP are batched and translated; a page shows the experts of each token."""
