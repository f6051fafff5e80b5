#include "count.h"

#include <ctype.h>

void count(struct counts *counts, const char *text, size_t length)
{
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)text[i];
        counts->bytes++;
        if (c == '\n')
            counts->lines++;
        if (isspace(c)) {
            counts->in_word = 0;
        } else if (!counts->in_word) {
            counts->in_word = 1;
            counts->words++;
        }
    }
}
