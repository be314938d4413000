"""Small trainable additions to a frozen backbone."""
