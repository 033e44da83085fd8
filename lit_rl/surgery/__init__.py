"""Models made of models: weights merged tensor by tensor, and the best checkpoint of several by its evaluation."""
