// Inputs of the dataset's target: an .idx file laid out from its fields, whole or damaged in a few places.
#include <algorithm>
#include <initializer_list>

#include "dataset_target.h"
#include "index_oracle.h"

namespace fuzz {

namespace {

using mlfr::Stream;

void put(Bytes& file, size_t at, uint64_t value, size_t count) {
    for (size_t i = 0; i < count && at + i < file.size(); ++i)
        file[at + i] = static_cast<uint8_t>(value >> 8 * i);
}

void append(Bytes& file, uint64_t value, size_t count) {
    file.resize(file.size() + count);
    put(file, file.size() - count, value, count);
}

uint64_t one_of(Stream& random, std::initializer_list<uint64_t> values) {
    return values.begin()[random.below(values.size())];
}

// Near limits of 32 and 64 bits, or where a product with 8 or 12 passes 2^64.
uint64_t extreme(Stream& random) {
    const uint64_t near =
        one_of(random, {0, uint64_t{1} << 31, uint64_t{1} << 32, uint64_t{1} << 59, uint64_t{1} << 60,
                        uint64_t{1} << 61, uint64_t{1} << 62, uint64_t{1} << 63});
    return near + random.below(9) - 4;
}

uint64_t length_of_sequence(Stream& random) {
    const uint64_t kind = random.below(64);
    if (kind == 0) return 0x7FFFFFFF - random.below(2);
    return kind < 16 ? 0 : random.below(40);
}

Bytes whole_file(Stream& random) {
    const uint64_t sequences = random.below(64) == 0 ? random.below(400) : random.below(12);
    const uint64_t code = one_of(random, {1, 2, 3, 4, 5, 8});
    std::vector<uint64_t> documents{0};
    for (uint64_t more = random.below(6); more > 0; --more) documents.push_back(random.below(sequences + 1));
    if (sequences > 0 || random.below(2) == 0) documents.push_back(sequences);
    std::sort(documents.begin(), documents.end());
    if (sequences == 0 && random.below(4) == 0) documents.clear();  // to be refused

    Bytes file{'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0};
    file.reserve(kHeaderBytes + 12 * sequences + 8 * documents.size() + 32);
    append(file, 1, 8);
    append(file, code, 1);
    append(file, sequences, 8);
    append(file, documents.size(), 8);
    std::vector<uint64_t> positions;
    uint64_t end = 0;
    for (uint64_t s = 0; s < sequences; ++s) {
        const uint64_t length = length_of_sequence(random);
        append(file, length, 4);
        positions.push_back(end);
        end += length * item_bytes(static_cast<unsigned>(code));
    }
    for (const uint64_t position : positions) append(file, position, 8);
    for (const uint64_t document : documents) append(file, document, 8);
    return file;
}

// Counts that were damaged before can put `at` anywhere.
bool holds(const Bytes& file, size_t at, size_t count) {
    return at <= file.size() && count <= file.size() - at;
}

// A field of `count` bytes becomes another number: extreme, or close to what it was.
void change_field(Stream& random, Bytes& file, size_t at, size_t count) {
    if (!holds(file, at, count)) return;
    const uint64_t near = little_endian(&file[at], count) + random.below(17) - 8;
    put(file, at, random.below(2) == 0 ? near : extreme(random), count);
}

void damage(Stream& random, Bytes& file) {
    const uint64_t sequences = little_endian(&file[kSequencesAt], 8),
                   entries = little_endian(&file[kEntriesAt], 8);
    const size_t body = kHeaderBytes, pointers = body + 4 * sequences, documents = body + 12 * sequences;
    const size_t s = sequences > 0 ? random.below(sequences) : 0, e = random.below(entries);
    switch (random.below(12)) {
        case 0:
            return change_field(random, file, random.below(kSequencesAt), 1);
        case 1:
            return put(file, kCodeAt, random.below(10), 1);
        case 2:
            return change_field(random, file, random.below(2) == 0 ? kSequencesAt : kEntriesAt, 8);
        case 3: {  // counts that lie and fit the size of the file nevertheless, modulo 2^64 at least
            const uint64_t more = random.below(2) == 0 ? 2 : extreme(random);
            put(file, kSequencesAt, sequences + more, 8);
            return put(file, kEntriesAt, entries - more / 2 * 3, 8);
        }
        case 4:
            return change_field(random, file, body + 4 * s, 4);
        case 5:
            return change_field(random, file, pointers + 8 * s, 8);
        case 6:
            return change_field(random, file, documents + 8 * e, 8);
        case 7: {  // two sequences trade places, or lie on one another
            const size_t other = pointers + 8 * (sequences > 0 ? random.below(sequences) : 0);
            if (!holds(file, pointers + 8 * s, 8) || !holds(file, other, 8)) return;
            return put(file, pointers + 8 * s, little_endian(&file[other], 8), 8);
        }
        case 8:
            return file.resize(random.below(file.size()));
        case 9:
            return file.resize(file.size() + 1 + random.below(24), static_cast<uint8_t>(random.next()));
        case 10:  // the last length: all pointers stay right
            return put(file, pointers - 4, random.below(50), sequences > 0 ? 4 : 0);
        default:
            file[random.below(file.size())] = static_cast<uint8_t>(random.next());
    }
}

Control make_control(Stream& random) {
    Control control{};
    control.bin = static_cast<uint8_t>(random.below(8));
    control.bin_delta = static_cast<int8_t>(random.below(17) - 8);
    control.later = static_cast<uint8_t>(random.below(6));
    control.rows = static_cast<uint8_t>(random.below(8));
    control.row_length = static_cast<uint16_t>(random.below(random.below(64) == 0 ? 4096 : 24));
    control.later_at = static_cast<uint16_t>(random.next());
    control.start = random.below(2) == 0 ? random.below(300) - 8 : extreme(random);
    control.ask = random.below(2) == 0 ? random.below(16) : extreme(random);
    return control;
}

}  // namespace

Bytes make_input(Stream& random) {
    const Control control = make_control(random);
    Bytes file = whole_file(random);
    for (uint64_t faults = random.below(3); faults > 0 && file.size() > kHeaderBytes; --faults)
        damage(random, file);
    Bytes input(sizeof control);
    std::memcpy(input.data(), &control, sizeof control);
    input.insert(input.end(), file.begin(), file.end());
    return input;
}

}  // namespace fuzz
