#ifndef COUNT_H
#define COUNT_H

#include <stddef.h>

struct counts {
    size_t lines, words, bytes;
    int in_word; /* whether the last byte belongs to a word that may go on */
};

void count(struct counts *counts, const char *text, size_t length);

#endif
