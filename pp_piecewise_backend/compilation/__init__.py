"""From the FX graph that Dynamo gives to compiled pieces. Knows no buckets, devices or ranks."""
