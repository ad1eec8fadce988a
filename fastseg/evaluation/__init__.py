"""How right label maps are: the confusion matrix of a data set, and two models compared."""
