// Package bucket keeps chunks in an object store: S3, Azure, anything that speaks S3's protocol (Google's among them), or a
// folder.
//
// Several nodes may write to one bucket, and none knows of the others. A chunk that is found there is therefore taken as
// there only while it is young; one that is old is written again, which makes it young. A collection removes chunks that no
// ref leads to when they are twice as old as that. So whoever found a chunk has had at least that long to set a ref.
package bucket

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"strings"
	"sync/atomic"
	"time"

	"gocloud.dev/blob"
	_ "gocloud.dev/blob/azureblob" // azblob://
	_ "gocloud.dev/blob/fileblob"  // file://
	_ "gocloud.dev/blob/s3blob"    // s3://
	"gocloud.dev/gcerrors"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/chunk/pack"
	"github.com/atoll-run/atoll/sandbox"
)

// Options configures a Bucket. The zero value is good.
type Options struct {
	// Fresh is how long a chunk that is found there is relied upon, and more than any writer takes to set its ref after it;
	// 0 means a week.
	Fresh time.Duration
	// Plan says how to pack a chunk's content; nil keeps it as it is.
	Plan func(data []byte) pack.Plan
	// Now is the clock; nil means time.Now. It may differ from that of the object store by less than Fresh.
	Now func() time.Time
}

const defaultFresh = 7 * 24 * time.Hour

// Bucket is a chunk.Store. Chunks are the objects "chunks/ab/cdef...", refs are "refs/NAME".
type Bucket struct {
	blobs   *blob.Bucket
	opts    Options
	written atomic.Int64 // bytes of chunks
}

var _ chunk.Store = (*Bucket)(nil)

// Open opens the bucket at a URL: "s3://NAME?region=...", "azblob://CONTAINER", "file:///DIR". Credentials are found where
// the providers' own tools look for them. Another endpoint of S3's protocol is given by "endpoint=https://...", Google's
// being https://storage.googleapis.com.
func Open(ctx context.Context, url string, o Options) (*Bucket, error) {
	b, err := blob.OpenBucket(ctx, url)
	if err != nil {
		hint := "a bucket is s3://NAME, azblob://CONTAINER or file:///DIR"
		if errors.Is(err, fs.ErrNotExist) {
			hint = "make the directory first"
		}
		return nil, sandbox.E("bucket.Open", sandbox.Invalid, url, err).WithHint(hint)
	}
	return New(b, o), nil
}

// New returns a store in an open bucket, which it owns.
func New(b *blob.Bucket, o Options) *Bucket {
	if o.Fresh == 0 {
		o.Fresh = defaultFresh
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Bucket{blobs: b, opts: o}
}

// Close gives the bucket up.
func (b *Bucket) Close() error { return b.blobs.Close() }

const (
	chunkPrefix = "chunks/"
	refPrefix   = "refs/"
	maxRef      = 256 // bytes of a ref's object
)

func chunkKey(id chunk.ID) string {
	name := id.String()
	return chunkPrefix + name[:2] + "/" + name[2:]
}

// Put implements chunk.Store.
func (b *Bucket) Put(ctx context.Context, data []byte) (chunk.ID, error) {
	const op = "bucket.Put"
	if err := chunk.CheckSize(len(data)); err != nil {
		return chunk.ID{}, err
	}
	id := chunk.Sum(data)
	if there, err := b.there(ctx, id); err != nil || there {
		return id, err
	}
	var plan pack.Plan
	if b.opts.Plan != nil {
		plan = b.opts.Plan(data)
	}
	envelope, err := pack.Append(nil, data, nil, plan)
	if err != nil {
		return chunk.ID{}, sandbox.E(op, sandbox.Internal, id.String(), err)
	}
	if err := b.blobs.WriteAll(ctx, chunkKey(id), envelope, nil); err != nil {
		return chunk.ID{}, fail(op, id.String(), err)
	}
	b.written.Add(int64(len(envelope)))
	return id, nil
}

// Written returns how many bytes of chunks were written since the bucket was opened, as they are kept.
func (b *Bucket) Written() int64 { return b.written.Load() }

// there reports whether a chunk is there and young.
func (b *Bucket) there(ctx context.Context, id chunk.ID) (bool, error) {
	const op = "bucket.Missing"
	if err := ctx.Err(); err != nil {
		return false, fail(op, id.String(), err)
	}
	a, err := b.blobs.Attributes(ctx, chunkKey(id))
	switch {
	case gcerrors.Code(err) == gcerrors.NotFound:
		return false, nil
	case err != nil:
		return false, fail(op, id.String(), err)
	}
	return b.opts.Now().Sub(a.ModTime) < b.opts.Fresh, nil
}

// Get implements chunk.Store.
func (b *Bucket) Get(ctx context.Context, id chunk.ID) ([]byte, error) {
	envelope, err := b.read(ctx, chunkKey(id), chunk.MaxSize+1<<10) // stored content is a little longer than it is
	if err != nil {
		return nil, fail("bucket.Get", id.String(), err)
	}
	data, err := chunk.Open(envelope, id)
	if err != nil {
		return nil, errors.Join(err, b.Delete(ctx, id))
	}
	return data, nil
}

// read reads an object of at most limit bytes; of a longer one it returns the beginning.
func (b *Bucket) read(ctx context.Context, key string, limit int64) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r, err := b.blobs.NewReader(ctx, key, nil)
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(r, limit))
	return data, errors.Join(err, r.Close())
}

// Missing implements chunk.Store. It asks for one chunk at a time.
func (b *Bucket) Missing(ctx context.Context, ids []chunk.ID) ([]chunk.ID, error) {
	var missing []chunk.ID
	for _, id := range ids {
		there, err := b.there(ctx, id)
		if err != nil {
			return nil, err
		}
		if !there {
			missing = append(missing, id)
		}
	}
	return missing, nil
}

// Delete implements chunk.Store.
func (b *Bucket) Delete(ctx context.Context, id chunk.ID) error {
	return b.remove(ctx, "bucket.Delete", chunkKey(id))
}

func (b *Bucket) remove(ctx context.Context, op, key string) error {
	if err := b.blobs.Delete(ctx, key); err != nil && gcerrors.Code(err) != gcerrors.NotFound {
		return fail(op, key, err)
	}
	return nil
}

// Each implements chunk.Store.
func (b *Bucket) Each(ctx context.Context, fn func(chunk.Entry) error) error {
	return b.list(ctx, chunkPrefix, func(o *blob.ListObject) error {
		name := strings.TrimPrefix(o.Key, chunkPrefix)
		if len(name) < 3 || name[2] != '/' {
			return nil // not ours
		}
		id, err := chunk.ParseID(name[:2] + name[3:])
		if err != nil {
			return nil // not ours
		}
		return fn(chunk.Entry{ID: id, Size: o.Size, Written: o.ModTime})
	})
}

// list calls fn for the objects with a prefix, in the order of their keys. A folder that is read while objects are removed
// from it fails; then it is read again from where it was.
func (b *Bucket) list(ctx context.Context, prefix string, fn func(*blob.ListObject) error) error {
	last := ""
	for attempt := 0; ; attempt++ {
		err := b.listAfter(ctx, prefix, &last, fn)
		if gcerrors.Code(err) != gcerrors.NotFound || attempt == maxListings {
			return err
		}
	}
}

const maxListings = 100

func (b *Bucket) listAfter(ctx context.Context, prefix string, last *string, fn func(*blob.ListObject) error) error {
	for it := b.blobs.List(&blob.ListOptions{Prefix: prefix}); ; {
		o, err := it.Next(ctx)
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case gcerrors.Code(err) == gcerrors.NotFound:
			return err
		case err != nil:
			return fail("bucket.List", prefix, err)
		}
		if o.Key <= *last {
			continue
		}
		*last = o.Key
		if err := fn(o); err != nil {
			return err
		}
	}
}

// SetRef implements chunk.Store.
func (b *Bucket) SetRef(ctx context.Context, name string, id chunk.ID) error {
	if err := chunk.CheckRefName(name); err != nil {
		return err
	}
	if err := b.blobs.WriteAll(ctx, refPrefix+name, []byte(id.String()+"\n"), nil); err != nil {
		return fail("bucket.SetRef", name, err)
	}
	return nil
}

// Ref implements chunk.Store.
func (b *Bucket) Ref(ctx context.Context, name string) (chunk.ID, error) {
	if err := chunk.CheckRefName(name); err != nil {
		return chunk.ID{}, err
	}
	text, err := b.read(ctx, refPrefix+name, maxRef)
	if err != nil {
		return chunk.ID{}, fail("bucket.Ref", name, err)
	}
	return chunk.ParseID(strings.TrimSpace(string(text)))
}

// Refs implements chunk.Store.
func (b *Bucket) Refs(ctx context.Context) (map[string]chunk.ID, error) {
	const op = "bucket.Refs"
	refs := make(map[string]chunk.ID)
	err := b.list(ctx, refPrefix, func(o *blob.ListObject) error {
		name := strings.TrimPrefix(o.Key, refPrefix)
		if chunk.CheckRefName(name) != nil {
			return nil // not ours
		}
		text, err := b.read(ctx, o.Key, maxRef)
		if gcerrors.Code(err) == gcerrors.NotFound {
			return nil // removed since
		}
		if err != nil {
			return fail(op, name, err)
		}
		id, err := chunk.ParseID(strings.TrimSpace(string(text)))
		if err != nil {
			return sandbox.E(op, "", name, err)
		}
		refs[name] = id
		return nil
	})
	return refs, err
}

// DeleteRef implements chunk.Store.
func (b *Bucket) DeleteRef(ctx context.Context, name string) error {
	if err := chunk.CheckRefName(name); err != nil {
		return err
	}
	return b.remove(ctx, "bucket.DeleteRef", refPrefix+name)
}

// Grace implements chunk.Store.
func (b *Bucket) Grace() time.Duration { return 2 * b.opts.Fresh }

// fail gives an error of the object store its kind.
func fail(op, subject string, err error) error {
	kind := sandbox.Unavailable // object stores are far away, and most of what they say will pass
	switch {
	case errors.Is(err, context.Canceled) || gcerrors.Code(err) == gcerrors.Canceled:
		kind = sandbox.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		kind = sandbox.Timeout
	case gcerrors.Code(err) == gcerrors.NotFound:
		kind = sandbox.NotFound
	case gcerrors.Code(err) == gcerrors.PermissionDenied:
		kind = sandbox.Denied
	case gcerrors.Code(err) == gcerrors.ResourceExhausted:
		kind = sandbox.Exhausted
	}
	return sandbox.E(op, kind, subject, err)
}
