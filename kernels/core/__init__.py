"""Registration, dispatch, launches, launch configurations and argument checks of the ops."""
