package image

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"golang.org/x/sync/errgroup"

	"github.com/atoll-run/atoll/sandbox"
)

// RegistryOptions says how to talk to a registry.
type RegistryOptions struct {
	Username, Password string         // empty: what Docker's configuration says
	Insecure           bool           // plain HTTP; loopback registries get it anyway
	Platform           string         // "os/arch[/variant]"; default: this host's
	Progress           func(Progress) // nil: none
	Transport          http.RoundTripper
}

// Bounds of a pull.
const (
	maxLayers       = 1000
	parallelFetches = 3 // as many as Docker
)

// Pull fetches an image by tag or digest and converts it. What was fetched stays
// on disk when the pull fails, and the next one goes on from there. It fails
// with NotFound for an unknown image or platform, Denied when the registry
// wants other credentials, Unavailable when it does not answer, and Invalid
// for contents that do not match their digest.
func (s *Store) Pull(ctx context.Context, ref string, o RegistryOptions) (Image, error) {
	const op = "image.Pull"
	if err := checkName(Familiar(ref)); err != nil {
		return Image{}, sandbox.E(op, sandbox.Invalid, ref, err)
	}
	r, err := o.reference(ref)
	if err != nil {
		return Image{}, sandbox.E(op, sandbox.Invalid, ref, err)
	}
	if o.Platform == "" {
		o.Platform = HostPlatform()
	}
	desc, err := remote.Get(r, o.remote(ctx)...)
	if err != nil {
		return Image{}, registryError(op, ref, err)
	}
	if i, err := s.Get(ref); err == nil && i.Digest == desc.Digest.String() && platformMatches(i.Platform, o.Platform) && s.VerifyRoot(i.Root) == nil {
		return i, nil
	}
	manifest, config, err := o.resolve(ctx, r, desc)
	if err != nil {
		return Image{}, registryError(op, ref, err)
	}
	image := fromOCI(config)
	image.Digest = desc.Digest.String()
	image.Source = "pulled from " + r.Context().Name()
	image, err = s.pullLayers(ctx, op, r, o, manifest, image, ref)
	if err != nil {
		return Image{}, registryError(op, ref, err)
	}
	return image, nil
}

// platformMatches compares what an image says with what was asked for, where
// the variant may be left out.
func platformMatches(have, want string) bool {
	return have == want || strings.HasPrefix(have, want+"/")
}

func (o *RegistryOptions) reference(ref string) (name.Reference, error) {
	opts := []name.Option{name.WeakValidation}
	if o.Insecure {
		opts = append(opts, name.Insecure)
	}
	return name.ParseReference(ref, opts...)
}

func (o *RegistryOptions) remote(ctx context.Context) []remote.Option {
	return []remote.Option{
		remote.WithContext(ctx),
		remote.WithAuthFromKeychain(o.keychain()),
		remote.WithTransport(boundedDocuments{o.transport()}),
		remote.WithUserAgent("atoll"),
	}
}

func (o *RegistryOptions) transport() http.RoundTripper {
	if o.Transport != nil {
		return boundedRedirects{o.Transport}
	}
	return boundedRedirects{remote.DefaultTransport}
}

// maxRedirects is how often one request may be sent on, as in net/http.
const maxRedirects = 10

var errRedirects = sandbox.Errorf("ask the registry", sandbox.Unavailable, "", "stopped after %d redirects", maxRedirects)

// boundedRedirects fails requests that were redirected too often: the client of
// the registry library would follow for ever.
type boundedRedirects struct{ http.RoundTripper }

func (b boundedRedirects) RoundTrip(r *http.Request) (*http.Response, error) {
	hops := 0
	for from := r.Response; from != nil && from.Request != nil; from = from.Request.Response {
		if hops++; hops >= maxRedirects {
			return nil, errRedirects
		}
	}
	return b.RoundTripper.RoundTrip(r)
}

func (o *RegistryOptions) keychain() authn.Keychain {
	if o.Username == "" {
		return authn.DefaultKeychain
	}
	return fixedKeychain{&authn.Basic{Username: o.Username, Password: o.Password}}
}

type fixedKeychain struct{ auth authn.Authenticator }

func (f fixedKeychain) Resolve(authn.Resource) (authn.Authenticator, error) { return f.auth, nil }

// boundedDocuments keeps a registry from filling our memory with a manifest.
// Layers do not pass through it.
type boundedDocuments struct{ http.RoundTripper }

func (b boundedDocuments) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.RoundTripper.RoundTrip(r)
	if err == nil && r.Method == http.MethodGet {
		resp.Body = http.MaxBytesReader(nil, resp.Body, maxDocument)
	}
	return resp, err
}

// resolve finds the manifest and the configuration for the platform.
func (o *RegistryOptions) resolve(ctx context.Context, r name.Reference, desc *remote.Descriptor) (*v1.Manifest, *v1.ConfigFile, error) {
	for depth := 0; desc.MediaType.IsIndex(); depth++ {
		if depth > 3 {
			return nil, nil, sandbox.Errorf("resolve", sandbox.Invalid, "", "indexes are nested too deeply")
		}
		index, err := v1.ParseIndexManifest(strings.NewReader(string(desc.Manifest)))
		if err != nil {
			return nil, nil, sandbox.E("resolve", sandbox.Invalid, "", err)
		}
		d, err := choosePlatform(*index, o.Platform)
		if err != nil {
			return nil, nil, sandbox.E("resolve", sandbox.NotFound, "", err)
		}
		if desc, err = remote.Get(r.Context().Digest(d.Digest.String()), o.remote(ctx)...); err != nil {
			return nil, nil, err
		}
	}
	img, err := desc.Image()
	if err != nil {
		return nil, nil, err
	}
	manifest, err := img.Manifest()
	if err != nil {
		return nil, nil, err
	}
	if len(manifest.Layers) > maxLayers || manifest.Config.Size > maxDocument {
		return nil, nil, sandbox.Errorf("resolve", sandbox.Invalid, "", "the manifest is absurd: %d layers, a configuration of %d bytes", len(manifest.Layers), manifest.Config.Size)
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, nil, err
	}
	if have := config.OS + "/" + config.Architecture; config.OS != "" && !strings.HasPrefix(o.Platform+"/", have+"/") {
		return nil, nil, sandbox.Errorf("resolve", sandbox.NotFound, "", "the image is for platform %s, not for %s", have, o.Platform)
	}
	return manifest, config, nil
}

// pullLayers fetches the layers that are not here yet and converts them all.
func (s *Store) pullLayers(ctx context.Context, op string, r name.Reference, o RegistryOptions, m *v1.Manifest, image Image, ref string) (Image, error) {
	var total int64
	for _, l := range m.Layers {
		if l.Digest.Algorithm != "sha256" || l.Size < 0 || len(l.URLs) > 0 {
			return Image{}, sandbox.Errorf(op, sandbox.Unsupported, ref, "layer %s cannot be fetched from a registry", l.Digest)
		}
		if total += l.Size; total < 0 || total > s.opts.Limits.withDefaults().Bytes {
			return Image{}, sandbox.Errorf(op, sandbox.Invalid, ref, "the layers are larger than the limit of %d bytes", s.opts.Limits.withDefaults().Bytes)
		}
		image.Layers = append(image.Layers, Layer{Digest: l.Digest.String(), Size: l.Size})
	}
	if i, ok, err := s.sameLayers(op, image, ref); ok || err != nil {
		return i, err
	}
	f, err := s.newFetcher(ctx, r, o)
	if err != nil {
		return Image{}, err
	}
	files := make([]*os.File, len(m.Layers))
	defer func() {
		for _, f := range files {
			if f != nil {
				_ = f.Close()
			}
		}
	}()
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(parallelFetches)
	for n, l := range image.Layers {
		group.Go(func() (err error) {
			files[n], err = f.fetch(gctx, l)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return Image{}, err
	}
	f.report(Progress{Stage: "convert"})
	return s.fromLayers(ctx, op, image, files, true, ref)
}

// sameLayers spares the work when an image of the same layers is already here.
func (s *Store) sameLayers(op string, image Image, ref string) (Image, bool, error) {
	unlock, err := s.lockShared()
	if err != nil {
		return Image{}, false, err
	}
	defer unlock()
	records, err := s.records()
	if err != nil {
		return Image{}, false, err
	}
	for _, r := range records {
		// A working directory that the layers lack is made beside them.
		if len(r.Layers) == 0 || !slices.Equal(r.Layers, image.Layers) || r.Config.WorkingDir != image.Config.WorkingDir {
			continue
		}
		if s.VerifyRoot(r.Root) != nil {
			continue // made anew, it replaces what is damaged
		}
		image.Root, image.Size = r.Root, r.Size
		image, err = s.takeNames(op, image, []string{ref}, true)
		return image, err == nil, err
	}
	return Image{}, false, nil
}

// registryError gives an error that a registry or the way to it caused its kind
// and says what helps.
func registryError(op, ref string, err error) error {
	var known *sandbox.Err
	var answer *transport.Error
	var network net.Error
	var path *fs.PathError // of our own disk; its cause would pass for a net.Error
	switch {
	case errors.As(err, &known), errors.As(err, &path), errors.Is(err, context.Canceled):
		return fail(op, ref, err)
	case errors.As(err, &answer):
		return answerError(op, ref, answer)
	case errors.Is(err, context.DeadlineExceeded):
		return sandbox.E(op, sandbox.Timeout, ref, err)
	case errors.As(err, &network), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return sandbox.E(op, sandbox.Unavailable, ref, err).
			WithHint("the registry cannot be reached: check the network, or import the image from an archive with 'atoll image import'")
	}
	if strings.Contains(err.Error(), "server gave HTTP response to HTTPS client") {
		return sandbox.E(op, sandbox.Unavailable, ref, err).WithHint("the registry speaks plain HTTP: use --insecure")
	}
	return fail(op, ref, err)
}

func answerError(op, ref string, answer *transport.Error) error {
	switch code := answer.StatusCode; {
	case code == http.StatusNotFound:
		return sandbox.E(op, sandbox.NotFound, ref, answer).WithHint("check the image's name and tag")
	case code == http.StatusUnauthorized || code == http.StatusForbidden:
		return sandbox.E(op, sandbox.Denied, ref, answer).WithHint("there is no such image, or it is private: 'docker login' stores credentials that Atoll uses too")
	case code == http.StatusTooManyRequests:
		return sandbox.E(op, sandbox.Unavailable, ref, answer).WithHint("the registry limits how often it is asked: log in, or wait")
	case code >= 500 || code == http.StatusRequestTimeout:
		return sandbox.E(op, sandbox.Unavailable, ref, answer)
	}
	return sandbox.E(op, sandbox.Invalid, ref, answer)
}

// reporter passes progress on, one call after another.
type reporter struct {
	mu sync.Mutex
	to func(Progress) // nil: nowhere
}

func (r *reporter) report(p Progress) {
	if r.to == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.to(p)
}
