package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"

	"github.com/atoll-run/atoll/sandbox"
)

// asOCI returns an image as OCI knows it, with one layer that holds exactly what
// sandboxes see. The caller calls closer when done.
func (s *Store) asOCI(i Image) (img v1.Image, closer func(), err error) {
	if i.Root.Kind != sandbox.RootEROFS {
		return nil, nil, notFiles("export", i, "exported as an archive of layers")
	}
	f, err := s.temp()
	if err != nil {
		return nil, nil, err
	}
	img, err = s.packRoot(f.File, i)
	if err != nil {
		f.discard()
		return nil, nil, err
	}
	return img, f.discard, nil
}

// packRoot writes the root into f as a compressed layer, and an image around it.
func (s *Store) packRoot(f *os.File, i Image) (v1.Image, error) {
	// The fastest level: the archive moves once, and levels above cost minutes.
	z, err := gzip.NewWriterLevel(f, gzip.BestSpeed)
	if err != nil {
		return nil, err
	}
	if err := s.writeRootTar(z, i.Root.Path); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromFile(f.Name(), tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	return i.ociImage(layer)
}

// writeRootTar writes a root as a tar archive.
func (s *Store) writeRootTar(w io.Writer, root string) error {
	u, err := newUnpacker(s.path("tmp"), s.opts.Limits, s.opts.Xattrs)
	if err != nil {
		return err
	}
	defer u.Close()
	f, err := os.Open(root)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if err := u.addEROFS(f, info.Size()); err != nil {
		return err
	}
	return writeTar(w, u.tree, nil)
}

func (i *Image) ociImage(layer v1.Layer) (v1.Image, error) {
	system, architecture, _ := strings.Cut(i.Platform, "/")
	architecture, variant, _ := strings.Cut(architecture, "/")
	config := &v1.ConfigFile{
		OS: system, Architecture: architecture, Variant: variant,
		Created: v1.Time{Time: i.Created},
		Config: v1.Config{
			Env: i.Config.Env, User: i.Config.User, WorkingDir: i.Config.WorkingDir,
			Entrypoint: i.Config.Entrypoint, Cmd: i.Config.Cmd, Labels: i.Config.Labels, Shell: i.Config.Shell,
		},
	}
	for _, port := range i.Config.ExposedPorts {
		if config.Config.ExposedPorts == nil {
			config.Config.ExposedPorts = map[string]struct{}{}
		}
		config.Config.ExposedPorts[port] = struct{}{}
	}
	img, err := mutate.ConfigFile(mutate.MediaType(empty.Image, types.OCIManifestSchema1), config)
	if err != nil {
		return nil, err
	}
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	return mutate.Append(img, mutate.Addendum{Layer: layer, History: v1.History{CreatedBy: "atoll", Comment: i.Source, Created: v1.Time{Time: i.Created}}})
}

// Push uploads an image to a registry under the name dest.
func (s *Store) Push(ctx context.Context, ref, dest string, o RegistryOptions) error {
	const op = "image.Push"
	i, err := s.Get(ref)
	if err != nil {
		return err
	}
	target, err := o.reference(dest)
	if err != nil {
		return sandbox.E(op, sandbox.Invalid, dest, err)
	}
	img, closeImage, err := s.asOCI(i)
	if err != nil {
		return fail(op, ref, err)
	}
	defer closeImage()
	options := o.remote(ctx)
	if o.Progress != nil {
		updates := make(chan v1.Update, 16)
		done := make(chan struct{})
		go func() { // remote.Write closes updates
			defer close(done)
			for u := range updates {
				o.Progress(Progress{Stage: "push", Done: u.Complete, Total: u.Total})
			}
		}()
		defer func() { <-done }()
		options = append(options, remote.WithProgress(updates))
	}
	if err := remote.Write(target, img, options...); err != nil {
		return registryError(op, dest, err)
	}
	return nil
}

// Export writes an image as a tar archive that "docker load" and everything
// that reads OCI layouts understand.
func (s *Store) Export(ctx context.Context, ref string, w io.Writer) error {
	const op = "image.Export"
	i, err := s.Get(ref)
	if err != nil {
		return err
	}
	img, closeImage, err := s.asOCI(i)
	if err != nil {
		return fail(op, ref, err)
	}
	defer closeImage()
	if err := writeArchive(contextWriter{ctx, w}, img, i.Names); err != nil {
		return fail(op, ref, err)
	}
	return nil
}

// contextWriter fails once its context has ended.
type contextWriter struct {
	ctx context.Context
	w   io.Writer
}

func (c contextWriter) Write(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.w.Write(p)
}

// writeArchive writes an OCI layout with the manifest.json of "docker save".
func writeArchive(w io.Writer, img v1.Image, names []string) error {
	manifest, err := img.Manifest()
	if err != nil {
		return err
	}
	digest, err := img.Digest()
	if err != nil {
		return err
	}
	rawManifest, err := img.RawManifest()
	if err != nil {
		return err
	}
	rawConfig, err := img.RawConfigFile()
	if err != nil {
		return err
	}
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	a := archiveWriter{tar.NewWriter(w)}
	docker := dockerManifest{Config: blobName(manifest.Config.Digest), RepoTags: tags(names)}
	for n, layer := range layers {
		l := manifest.Layers[n]
		docker.Layers = append(docker.Layers, blobName(l.Digest))
		if err := a.layer(layer, l); err != nil {
			return err
		}
	}
	descriptor := v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: digest, Size: int64(len(rawManifest))}
	if len(docker.RepoTags) > 0 {
		descriptor.Annotations = map[string]string{refNames[0]: docker.RepoTags[0]}
	}
	index := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{descriptor}}
	return errors.Join(
		a.document(docker.Config, rawConfig),
		a.document(blobName(digest), rawManifest),
		a.document("index.json", []byte(jsonText(index))),
		a.document("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)),
		a.document("manifest.json", []byte(jsonText([]dockerManifest{docker}))),
		a.Close(),
	)
}

// tags returns the names that Docker takes for tags.
func tags(names []string) []string {
	out := []string{}
	for _, n := range names {
		if _, err := name.NewTag(n); err == nil {
			out = append(out, n)
		}
	}
	return out
}

// archiveWriter writes the files of an archive of images.
type archiveWriter struct{ *tar.Writer }

func (a archiveWriter) put(name string, size int64, r io.Reader) error {
	err := a.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size, ModTime: time.Unix(0, 0)})
	if err != nil {
		return err
	}
	_, err = io.Copy(a, r)
	return err
}

func (a archiveWriter) document(name string, text []byte) error {
	return a.put(name, int64(len(text)), bytes.NewReader(text))
}

func (a archiveWriter) layer(layer v1.Layer, d v1.Descriptor) error {
	r, err := layer.Compressed()
	if err != nil {
		return err
	}
	return errors.Join(a.put(blobName(d.Digest), d.Size, r), r.Close())
}
