package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"net/http"
	"os"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/atoll-run/atoll/sandbox"
)

// Bounds of one download.
const (
	fetchAttempts = 5                // without a single new byte in between
	fetchRestarts = 100              // in all
	fetchStall    = 60 * time.Second // without a byte, before an attempt counts as failed
	fetchBackoff  = 200 * time.Millisecond
	reportEvery   = 256 << 10 // bytes between two reports of progress
)

// fetcher downloads layers of one repository.
type fetcher struct {
	store  *Store
	client *http.Client
	base   string // URL that digests are appended to
	reporter
}

func (s *Store) newFetcher(ctx context.Context, r name.Reference, o RegistryOptions) (*fetcher, error) {
	repo := r.Context()
	auth, err := o.keychain().Resolve(repo)
	if err != nil {
		return nil, err
	}
	rt, err := transport.NewWithContext(ctx, repo.Registry, auth, o.transport(), []string{repo.Scope(transport.PullScope)})
	if err != nil {
		return nil, err
	}
	return &fetcher{
		store:    s,
		client:   &http.Client{Transport: rt},
		base:     fmt.Sprintf("%s://%s/v2/%s/blobs/", repo.Scheme(), repo.RegistryStr(), repo.RepositoryStr()),
		reporter: reporter{to: o.Progress},
	}, nil
}

// fetch returns a layer's compressed bytes, verified, from the cache or the
// registry. The caller closes the file.
func (f *fetcher) fetch(ctx context.Context, l Layer) (*os.File, error) {
	final := f.store.path("blobs", blobFile(l.Digest))
	part, err := f.store.openLocked(ctx, f.store.path("partial", blobFile(l.Digest)))
	if err != nil {
		return nil, err
	}
	// Whoever holds the lock downloads; others have waited and find the result.
	if done, err := os.Open(final); err == nil {
		f.report(Progress{Stage: l.Digest, Done: l.Size, Total: l.Size})
		return done, errors.Join(os.Remove(part.Name()), part.Close())
	}
	d := &download{fetcher: f, layer: l, file: part}
	if err := d.run(ctx); err != nil {
		return nil, errors.Join(err, part.Close())
	}
	if err := f.keep(part, final); err != nil {
		return nil, errors.Join(err, part.Close())
	}
	return part, nil
}

// keep moves a finished download into the cache.
func (f *fetcher) keep(part *os.File, final string) error {
	if err := part.Sync(); err != nil {
		return err
	}
	unlock, err := f.store.lockShared()
	if err != nil {
		return err
	}
	defer unlock()
	return os.Rename(part.Name(), final)
}

// download is one layer on its way.
type download struct {
	*fetcher
	layer Layer
	file  *os.File
	hash  hash.Hash // of the bytes in file
	off   int64     // how many they are
}

// run goes on from what an earlier download left until all is there and
// verified.
func (d *download) run(ctx context.Context) error {
	if err := d.rehash(); err != nil {
		return err
	}
	resumed := d.off > 0
	for {
		if err := d.complete(ctx); err != nil {
			return err
		}
		got := hex.EncodeToString(d.hash.Sum(nil))
		if "sha256:"+got == d.layer.Digest {
			return nil
		}
		if err := d.reset(); err != nil {
			return err
		}
		if !resumed { // what a crash left behind may be at fault, but only once
			return sandbox.Errorf("fetch layer", sandbox.Invalid, d.layer.Digest, "corrupt: the registry sent sha256:%s", got)
		}
		resumed = false
	}
}

// rehash reads what is already in the file.
func (d *download) rehash() error {
	d.hash = sha256.New()
	info, err := d.file.Stat()
	if err != nil {
		return err
	}
	if info.Size() > d.layer.Size {
		return d.reset()
	}
	d.off, err = io.Copy(d.hash, io.NewSectionReader(d.file, 0, info.Size()))
	return err
}

func (d *download) reset() error {
	d.off = 0
	d.hash = sha256.New()
	return d.file.Truncate(0)
}

// complete fetches until the file has its full length.
func (d *download) complete(ctx context.Context) error {
	failures, best := 0, d.off
	for restart := 0; d.off < d.layer.Size; restart++ {
		err := d.attempt(ctx)
		if err == nil {
			continue
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if d.off > best {
			failures, best = 0, d.off
		}
		if failures++; failures >= fetchAttempts || restart >= fetchRestarts || !worthRetry(err) {
			return fmt.Errorf("layer %s: %w", d.layer.Digest, err)
		}
		d.store.log.Info("fetching a layer again", "digest", d.layer.Digest, "from", d.off, "err", err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(fetchBackoff << failures):
		}
	}
	return nil
}

// worthRetry reports whether the same request may fare better.
func worthRetry(err error) bool {
	var answer *transport.Error
	if errors.As(err, &answer) {
		return answer.StatusCode >= 500 || answer.StatusCode == http.StatusTooManyRequests
	}
	var path *fs.PathError // our own disk
	return !errors.As(err, &path) && !errors.Is(err, errTooLong) && !errors.Is(err, errRedirects)
}

var (
	errTooLong = sandbox.Errorf("fetch layer", sandbox.Invalid, "", "the registry sent more than the manifest says")
	errStalled = sandbox.Errorf("fetch layer", sandbox.Unavailable, "", "the registry sent nothing for %v", fetchStall)
)

// attempt asks for the rest of the layer once.
func (d *download) attempt(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stall := time.AfterFunc(fetchStall, func() { cancel(errStalled) })
	defer stall.Stop()
	err := d.get(ctx, stall)
	if errors.Is(context.Cause(ctx), errStalled) {
		return errStalled
	}
	return err
}

func (d *download) get(ctx context.Context, stall *time.Timer) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, d.base+d.layer.Digest, nil)
	if err != nil {
		return err
	}
	if d.off > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", d.off))
	}
	resp, err := d.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := d.accept(resp); err != nil {
		return err
	}
	return d.receive(resp.Body, stall)
}

// accept checks that the answer goes on where we are.
func (d *download) accept(resp *http.Response) error {
	if err := transport.CheckError(resp, http.StatusOK, http.StatusPartialContent, http.StatusRequestedRangeNotSatisfiable); err != nil {
		return err
	}
	var start int64
	if resp.StatusCode == http.StatusPartialContent {
		if _, err := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-", &start); err != nil {
			return fmt.Errorf("answer without a valid Content-Range %q", resp.Header.Get("Content-Range"))
		}
	}
	if start == d.off && resp.StatusCode != http.StatusRequestedRangeNotSatisfiable {
		return nil
	}
	// The registry cannot resume, so begin anew.
	if err := d.reset(); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the registry answered a range with %s", resp.Status)
	}
	return nil
}

// receive appends the body to the file.
func (d *download) receive(body io.Reader, stall *time.Timer) error {
	buf := make([]byte, 64<<10)
	reported := d.off
	for {
		n, err := body.Read(buf)
		stall.Reset(fetchStall)
		if d.off+int64(n) > d.layer.Size {
			return errTooLong
		}
		if _, werr := d.file.WriteAt(buf[:n], d.off); werr != nil {
			return werr
		}
		d.hash.Write(buf[:n])
		d.off += int64(n)
		if d.off-reported >= reportEvery || d.off == d.layer.Size {
			d.report(Progress{Stage: d.layer.Digest, Done: d.off, Total: d.layer.Size})
			reported = d.off
		}
		switch {
		case err == io.EOF && d.off < d.layer.Size:
			return io.ErrUnexpectedEOF
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
	}
}
