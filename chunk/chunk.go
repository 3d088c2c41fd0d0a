// Package chunk keeps immutable runs of bytes, named by their content, and the manifests that say what they make up.
//
// A Store holds chunks and refs: a ref is a name for a manifest, and a manifest is a chunk itself. A Vault is a store whose
// chunks stay as long as a ref leads to them, or a lease says that one soon will. Everything that is read is compared with
// its name first, so that a damaged disk, a lying server and a broken network are all the same: an error, never wrong bytes.
package chunk

import (
	"context"
	"encoding/hex"
	"time"

	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/sandbox"
)

// Sizes in bytes.
const (
	MaxSize = 4 << 20 // of a chunk
	CutSize = 1 << 20 // of the chunks into which WritePart cuts: disks and memories change in pages, so cuts are at fixed offsets
)

// ID names a chunk: the BLAKE3 hash of its content.
type ID [32]byte

// Sum returns the ID of some content.
func Sum(data []byte) ID { return blake3.Sum256(data) }

// String returns the ID in hexadecimal.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// ParseID is the inverse of String; it fails with Invalid.
func ParseID(s string) (ID, error) {
	var id ID
	if b, err := hex.DecodeString(s); err != nil || copy(id[:], b) != len(id) || len(b) != len(id) || id.String() != s {
		return ID{}, sandbox.Errorf("chunk.ParseID", sandbox.Invalid, "", "%.80q is not the name of a chunk", s)
	}
	return id, nil
}

// MarshalText implements encoding.TextMarshaler.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (id *ID) UnmarshalText(text []byte) (err error) {
	*id, err = ParseID(string(text))
	return err
}

// Store keeps chunks and refs. Its methods may be called from many goroutines; every error is a *sandbox.Err. chunktest is
// the suite that holds stores to this.
type Store interface {
	// Put keeps data, 1 to MaxSize bytes, and returns its name. When it returns, the content is safe, and visible to
	// everyone at once. It costs little when the chunk is there. It fails with Exhausted when there is no room, and leaves
	// nothing then.
	Put(ctx context.Context, data []byte) (ID, error)

	// Get returns a chunk's content. It fails with NotFound for one that is not there, and with Invalid for one that is
	// damaged, which from then on is not there, so that it can be put again.
	Get(ctx context.Context, id ID) ([]byte, error)

	// Missing returns which of the chunks would have to be put, in the order given.
	Missing(ctx context.Context, ids []ID) ([]ID, error)

	// Delete removes a chunk, if it is there. Only Vault.Collect knows which one may go.
	Delete(ctx context.Context, id ID) error

	// Each calls fn for every chunk that is there before and after the call, and perhaps for others; an error of fn ends it.
	Each(ctx context.Context, fn func(Entry) error) error

	// SetRef gives a manifest a name, in one step, and replaces what had it. When it returns, the ref and all chunks put
	// before have reached the disk. It fails with Invalid for a bad name.
	SetRef(ctx context.Context, name string, id ID) error

	// Ref returns the manifest that a ref names. It fails with NotFound when there is no such ref.
	Ref(ctx context.Context, name string) (ID, error)

	// Refs returns all refs.
	Refs(ctx context.Context) (map[string]ID, error)

	// DeleteRef removes a ref, if it is there.
	DeleteRef(ctx context.Context, name string) error

	// Grace is how long a chunk that no ref leads to must stay because a writer that this process does not know of may be
	// about to refer to it; 0 when there can be no such writer.
	Grace() time.Duration
}

// Entry is one chunk as it lies in a store.
type Entry struct {
	ID      ID
	Size    int64     // in bytes, as it is kept, not of its content
	Written time.Time // last
}

// maxRefName bounds a ref's name, in bytes.
const maxRefName = 200

// CheckRefName fails with Invalid unless name can name a ref: letters, digits and "-_./", beginning with a letter or digit
// in each part, so that it is safe as a path and as an object's key.
func CheckRefName(name string) error {
	begin := true
	for _, c := range []byte(name) {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		switch {
		case letter:
			begin = false
		case !begin && (c == '-' || c == '_' || c == '.'):
		case !begin && c == '/':
			begin = true
		default:
			return sandbox.Errorf("chunk.SetRef", sandbox.Invalid, "", "%.80q cannot name a ref", name)
		}
	}
	if begin || len(name) > maxRefName {
		return sandbox.Errorf("chunk.SetRef", sandbox.Invalid, "", "%.80q cannot name a ref", name)
	}
	return nil
}

// CheckSize fails with Invalid unless a chunk can have so many bytes.
func CheckSize(n int) error {
	if n < 1 || n > MaxSize {
		return sandbox.Errorf("chunk.Put", sandbox.Invalid, "", "a chunk of %d bytes; it must have 1 to %d", n, MaxSize)
	}
	return nil
}
