"""A program and its captures: what runs in each call. Knows no Dynamo, no compiler, no network."""
