/* A plug-in in C for the wire that agents of the Elkeid family use: tasks on descriptor 3, records
 * on descriptor 4, each a little-endian uint32 length and a protobuf message, settings in DETAIL.
 * It knows nothing of Outrider. DETAIL is "MODE [NUMBER]"; see main. Records carry a field "n"
 * with their number, and are written one by one. */
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static size_t put_varint(uint8_t *to, uint64_t value) {
    size_t n = 0;
    while (value > 0x7f) { to[n++] = (uint8_t)(value | 0x80); value >>= 7; }
    to[n++] = (uint8_t)value;
    return n;
}

static size_t put_text(uint8_t *to, int field, const void *text, size_t size) {
    size_t n = put_varint(to, (uint64_t)field << 3 | 2);
    n += put_varint(to + n, size);
    memcpy(to + n, text, size);
    return n + size;
}

static size_t put_pair(uint8_t *to, const char *key, const char *value, size_t size) {
    uint8_t *entry = malloc(size + 64);
    size_t n = put_text(entry, 1, key, strlen(key));
    n += put_text(entry + n, 2, value, size);
    n = put_text(to, 1, entry, n);
    free(entry);
    return n;
}

static void put_all(const void *data, size_t size) {
    const uint8_t *p = data;
    while (size) {
        ssize_t n = write(4, p, size);
        if (n <= 0) exit(3);
        p += n; size -= (size_t)n;
    }
}

/* Send a record with two fields. */
static void send_record(int type, const char *k1, const char *v1, const char *k2, const char *v2,
                        size_t s2) {
    uint8_t *payload = malloc(s2 + 512), *message = malloc(s2 + 1024);
    size_t p = put_pair(payload, k1, v1, strlen(v1));
    p += put_pair(payload + p, k2, v2, s2);
    size_t n = 4;
    message[n++] = 1 << 3; n += put_varint(message + n, (uint64_t)type);
    message[n++] = 2 << 3; n += put_varint(message + n, (uint64_t)time(NULL));
    n += put_text(message + n, 3, payload, p);
    uint32_t length = (uint32_t)(n - 4);
    for (int i = 0; i < 4; i++) message[i] = (uint8_t)(length >> 8 * i);
    put_all(message, n);
    free(payload); free(message);
}

static volatile sig_atomic_t ending;

static void on_term(int number) { (void)number; ending = 1; }

static void send_number(long n) {
    char text[24];
    snprintf(text, sizeof text, "%ld", n);
    send_record(6001, "n", text, "pid", "x", 1);
}

static int get_all(uint8_t *to, size_t size) {
    while (size) {
        ssize_t n = read(3, to, size);
        if (n <= 0) return 0;
        to += n; size -= (size_t)n;
    }
    return 1;
}

static uint64_t get_varint(const uint8_t **p) {
    uint64_t value = 0;
    for (int shift = 0;; shift += 7) {
        uint8_t byte = *(*p)++;
        value |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80) return value;
    }
}

/* Answer tasks until there are no more. */
static void answer_tasks(void) {
    uint8_t head[4];
    while (get_all(head, 4)) {
        uint32_t size = head[0] | head[1] << 8 | head[2] << 16 | (uint32_t)head[3] << 24;
        uint8_t *task = malloc(size + 1);
        if (!get_all(task, size)) return;
        char token[128] = "", *data = calloc(1, size + 1);
        size_t data_size = 0;
        int type = 0;
        const uint8_t *p = task;
        while (p < task + size) {
            uint64_t tag = get_varint(&p);
            uint64_t value = get_varint(&p);
            if (tag == (1 << 3)) { type = (int)value; continue; }
            if (tag == (3 << 3 | 2)) { memcpy(data, p, value); data_size = value; }
            if (tag == (4 << 3 | 2) && value < sizeof token) { memcpy(token, p, value); token[value] = 0; }
            p += value;
        }
        if (type == 13) exit(13);
        if (type != 14) send_record(type, "token", token, "data", data, data_size);
        free(task); free(data);
    }
}

int main(void) {
    const char *detail = getenv("DETAIL");
    char mode[32] = "";
    long number = 0;
    if (!detail || sscanf(detail, "%31s %ld", mode, &number) < 1) return 2;
    if (!strcmp(mode, "emit")) {                    /* so many records, then tasks */
        for (long n = 0; n < number; n++) send_number(n);
        answer_tasks();
    } else if (!strcmp(mode, "stream")) {           /* records till TERM; then a file says how many */
        signal(SIGTERM, on_term);
        long n = number;
        while (!ending) send_number(n++);
        char name[64];
        snprintf(name, sizeof name, "written.%ld", number);
        FILE *file = fopen(name, "w");
        fprintf(file, "%ld", n - number);
        return fclose(file);
    } else if (!strcmp(mode, "hang")) {             /* neither reads nor writes */
        for (;;) pause();
    } else if (!strcmp(mode, "stubborn")) {         /* nor takes TERM */
        signal(SIGTERM, SIG_IGN);
        send_number(1);
        for (;;) pause();
    } else if (!strcmp(mode, "rubbish")) {
        send_number(1);
        put_all("\xff\xff\xff\xff rubbish", 12);
        for (;;) pause();
    } else if (!strcmp(mode, "norecord")) {         /* good framing around something else */
        put_all("\x04\x00\x00\x00\xff\xff\xff\xff", 8);
        for (;;) pause();
    } else if (!strcmp(mode, "reserved")) {
        send_record(1000, "state", "running", "x", "y", 1);
        for (;;) pause();
    } else if (!strcmp(mode, "torn")) {             /* ends in the midst of a record */
        send_number(1);
        put_all("\x40\x00\x00\x00\x08", 5);
        return 0;
    } else if (!strcmp(mode, "notext")) {           /* a value that is no UTF-8, as file names are */
        send_record(6001, "n", "1", "name", "caf\xe9", 4);
        answer_tasks();
    } else if (!strcmp(mode, "huge")) {             /* one record of so many bytes */
        char *text = malloc((size_t)number);
        memset(text, 'x', (size_t)number);
        send_record(6001, "n", "1", "text", text, (size_t)number);
        answer_tasks();
    } else if (!strcmp(mode, "exit")) {
        return (int)number;
    } else if (!strcmp(mode, "fork")) {             /* children that leave its group and its session */
        for (long n = 0; n < number; n++)
            if (fork() == 0) {
                if (n % 2) setsid();
                if (fork() == 0) for (;;) pause();
                for (;;) pause();
            }
        send_number(1);
        answer_tasks();
    } else if (!strcmp(mode, "hog")) {              /* so many MiB, touched */
        for (long n = 0; n < number; n++) memset(malloc(1 << 20), 1, 1 << 20);
        send_number(1);
        for (;;) pause();
    } else if (!strcmp(mode, "print")) {            /* so many lines, then tasks */
        for (long n = 0; n < number; n++) fprintf(stderr, "line %ld\n", n);
        send_number(1);
        answer_tasks();
    } else {
        return 2;
    }
    return 0;
}
