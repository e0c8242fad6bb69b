"""Tasks: one file a task, one template: options, data, model, loss, metric. Recipes are data beside them."""
