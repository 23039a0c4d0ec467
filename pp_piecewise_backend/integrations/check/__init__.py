"""The command ``check``: does a pipeline of a decoder compute what eager transformers computes?"""
