package chunk

import (
	"encoding/binary"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// Manifest says of which chunks something consists. It is kept as a chunk, so it is at most MaxSize bytes when encoded:
// enough for about 100 GB.
type Manifest struct {
	Kind    string    // what it is: "snapshot", "image"; lower-case letters
	Parent  ID        // the manifest that this is a later version of; zero: none. It need not be there.
	Created time.Time // to the second
	Meta    []byte    // belongs to the caller
	Parts   []Part    // sorted by name
}

// Part is one run of bytes, a file as a rule.
type Part struct {
	Name   string // relative, slash-separated, stays within its folder
	Size   int64  // in bytes
	Digest ID     // BLAKE3 of all its content
	Chunks []Ref
}

// Ref is a chunk and the size of its content.
type Ref struct {
	ID   ID
	Size int
}

// Size is how many bytes all parts have.
func (m Manifest) Size() int64 {
	var n int64
	for _, p := range m.Parts {
		n += p.Size
	}
	return n
}

// The format of a manifest: "ATLM", version (1 byte), kind, 1 byte that says whether a parent follows, parent (32 bytes),
// seconds since 1970, meta, number of parts; for each part its name, size, digest (32 bytes), number of chunks; for each
// chunk its size and name (32 bytes). Numbers are unsigned varints, as short as they can be; kind, meta and names are
// preceded by their length. Nothing follows. So a manifest has exactly one encoding.
const (
	manifestMagic   = "ATLM"
	manifestVersion = 1
	maxParts        = 1 << 16
	maxPartName     = 1 << 10
	maxMeta         = 1 << 20
	maxKind         = 32
	maxPart         = 1 << 40 // bytes
)

// Encode returns the manifest's encoding. It fails with Invalid when the manifest makes no sense.
func (m Manifest) Encode() ([]byte, error) {
	if why := m.flaw(); why != "" {
		return nil, sandbox.Errorf("chunk.Encode", sandbox.Invalid, "", "not a manifest: %s", why)
	}
	b := append([]byte(manifestMagic), manifestVersion)
	b = appendBytes(b, []byte(m.Kind))
	if m.Parent == (ID{}) {
		b = append(b, 0)
	} else {
		b = append(append(b, 1), m.Parent[:]...)
	}
	b = binary.AppendUvarint(b, uint64(m.Created.Unix())) // flaw has seen that it is not negative
	b = appendBytes(b, m.Meta)
	b = binary.AppendUvarint(b, uint64(len(m.Parts)))
	for _, p := range m.Parts {
		b = appendBytes(b, []byte(p.Name))
		b = binary.AppendUvarint(b, uint64(p.Size))
		b = append(b, p.Digest[:]...)
		b = binary.AppendUvarint(b, uint64(len(p.Chunks)))
		for _, c := range p.Chunks {
			b = binary.AppendUvarint(b, uint64(c.Size))
			b = append(b, c.ID[:]...)
		}
	}
	if len(b) > MaxSize {
		return nil, sandbox.Errorf("chunk.Encode", sandbox.Invalid, "", "a manifest of %d bytes is more than a chunk holds", len(b))
	}
	return b, nil
}

func appendBytes(b, p []byte) []byte { return append(binary.AppendUvarint(b, uint64(len(p))), p...) }

// Decode reads a manifest, which may come from anyone: what it returns makes sense, and it allocates no more than a few
// times the bytes that it was given. It fails with Invalid.
func Decode(b []byte) (Manifest, error) {
	c := cursor{b: b}
	m := c.manifest()
	why := c.flaw
	if why == "" && len(c.b) > 0 {
		why = "something follows it"
	}
	if why == "" {
		why = m.flaw()
	}
	if why != "" || len(b) > MaxSize {
		return Manifest{}, sandbox.Errorf("chunk.Decode", sandbox.Invalid, "", "not a manifest: %s", why)
	}
	return m, nil
}

// flaw says why the manifest makes no sense; empty if it does.
func (m Manifest) flaw() string {
	word := m.Kind != "" && len(m.Kind) <= maxKind
	for _, c := range []byte(m.Kind) {
		word = word && c >= 'a' && c <= 'z'
	}
	switch {
	case !word:
		return "its kind is no word"
	case m.Created.Unix() < 0:
		return "it was made before 1970"
	case len(m.Meta) > maxMeta:
		return "its meta data are too large"
	case len(m.Parts) > maxParts:
		return "it has too many parts"
	}
	for i, p := range m.Parts {
		if why := p.flaw(); why != "" {
			return why
		}
		if i > 0 && m.Parts[i-1].Name >= p.Name {
			return "its parts are not sorted, or one is there twice"
		}
	}
	return ""
}

func (p Part) flaw() string {
	local := filepath.IsLocal(p.Name) && filepath.ToSlash(filepath.Clean(p.Name)) == p.Name && p.Name != "."
	if !local || len(p.Name) > maxPartName || strings.ContainsAny(p.Name, "\x00\\") {
		return "the name of a part is not a clean relative path"
	}
	var sum int64
	for _, c := range p.Chunks {
		if c.Size < 1 || c.Size > MaxSize {
			return "a chunk has an impossible size"
		}
		sum += int64(c.Size) // at most MaxSize * MaxSize/33: no overflow
	}
	if sum != p.Size || sum > maxPart {
		return "a part has another size than its chunks"
	}
	return ""
}

// A cursor reads an encoding; after its first flaw it reads zeros.
type cursor struct {
	b    []byte
	flaw string
}

func (c *cursor) fail(why string) {
	if c.flaw == "" {
		c.flaw = why
	}
	c.b = nil
}

func (c *cursor) manifest() (m Manifest) {
	if string(c.take(len(manifestMagic))) != manifestMagic || c.byte() != manifestVersion {
		c.fail("it begins otherwise, or is of a later version")
		return m
	}
	m.Kind = string(c.bytes(maxKind))
	switch c.byte() {
	case 0:
	case 1:
		if m.Parent = c.id(); m.Parent == (ID{}) {
			c.fail("its parent is none")
		}
	default:
		c.fail("a flag is neither 0 nor 1")
	}
	m.Created = time.Unix(int64(c.number(math.MaxInt32*1000)), 0).UTC()
	m.Meta = slices.Clone(c.bytes(maxMeta))
	parts := int(c.number(maxParts))
	for range min(parts, len(c.b)/35+1) { // no part takes less
		p := Part{Name: string(c.bytes(maxPartName)), Size: int64(c.number(maxPart)), Digest: c.id()}
		chunks := int(c.number(MaxSize))
		if chunks > len(c.b)/33 {
			c.fail("it ends too early")
			return m
		}
		p.Chunks = make([]Ref, chunks)
		for i := range p.Chunks {
			p.Chunks[i] = Ref{Size: int(c.number(MaxSize)), ID: c.id()}
		}
		m.Parts = append(m.Parts, p)
	}
	if len(m.Parts) != parts {
		c.fail("it ends too early")
	}
	return m
}

func (c *cursor) take(n int) []byte {
	if n > len(c.b) {
		c.fail("it ends too early")
		return nil
	}
	p := c.b[:n]
	c.b = c.b[n:]
	return p
}

func (c *cursor) byte() byte {
	if p := c.take(1); p != nil {
		return p[0]
	}
	return 0
}

func (c *cursor) id() (id ID) {
	copy(id[:], c.take(len(id)))
	return id
}

func (c *cursor) number(limit uint64) uint64 {
	v, n := binary.Uvarint(c.b)
	if n <= 0 || v > limit || n > 1 && c.b[n-1] == 0 { // the last: a longer form of the same number
		c.fail("a number is cut off, too large, or longer than it need be")
		return 0
	}
	c.b = c.b[n:]
	return v
}

func (c *cursor) bytes(limit int) []byte { return c.take(int(c.number(uint64(limit)))) }
