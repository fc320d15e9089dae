"""Other people's models, each library imported only by the package named after it."""
