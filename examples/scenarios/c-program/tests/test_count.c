#include <stdio.h>
#include <string.h>

#include "../count.h"

static int failures;

static void check(const char *what, size_t expected, size_t actual)
{
    int ok = expected == actual;
    printf("%s %s: expected %zu, got %zu\n", ok ? "ok  " : "FAIL", what, expected, actual);
    failures += !ok;
}

int main(void)
{
    struct counts counts = {0};
    count(&counts, "split wo", 8); /* a word may begin in one piece of the input */
    count(&counts, "rd\t\tend", 7); /* and end in the next */
    check("words over two pieces", 3, counts.words);
    check("bytes over two pieces", 15, counts.bytes);
    check("lines", 0, counts.lines);
    return failures != 0;
}
