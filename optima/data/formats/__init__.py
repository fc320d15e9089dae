"""A reader for each data set's official files, as they are downloaded."""
