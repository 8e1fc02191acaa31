"""At home in the trainers of others: one module for each, imported by nobody else.

Each needs the framework that it is named after, an optional extra of the same name
(`pip install 'dist_ckpt[transformers]'`). All of them save into runs as everybody's are.
"""
